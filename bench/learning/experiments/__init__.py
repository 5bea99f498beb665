"""Commands that each chose a default or answer one question: ``python -m bench.learning.experiments.NAME``.

==========  ==========================================================================================
`pretrain`  trains the byte-level model
`tune`      chose the demo's configuration
`transfer`  chose the library's default rate, on three models
`storage`   compares formats of importance and trace
`ranks`     compares low-rank weights of users with full-rank weights
`columns`   compares one set of weights with `ttt.GrowingLearner`
`drift`     measures what `ttt.Guard` prevents
==========  ==========================================================================================
"""
