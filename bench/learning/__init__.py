"""The benchmark of continual learning: methods are tuned, run in several scenarios, and compared over seeds.

``python -m bench.learning --help`` is the command.

=============  ==============================================================================================
`suite`        `Suite`: what the command needs of a suite, that is of its scenarios and methods
`suites`       the suites by name
`digits`       the suite "digits": images, learnt task by task
`text`         the suite "text": a language model that reads streams of text
`language`     the suite "streams": a real language model that reads streams of tokens
`runs`         making many runs, and the journal of finished ones
`tuning`       the search for each method's options; ``tuned`` holds its results
`clock`        the time of a method beside the frozen model's
`metrics`      forgetting, transfer, recovery, and intervals over seeds
`report`       figures, tables and bars from finished runs; `page` writes them as one HTML page
`command`      what the command does
`experiments`  further commands, which chose defaults or answer one question each
=============  ==============================================================================================

``byte_model`` holds the weights of the byte-level model of the demo and of the suite "text".
"""
