"""Many users, one model: each learns low-rank weights of their own, side by side in one batch.

`options` what a pool holds; `pool` who has which slot; `learner` observing batches of many users; `protection`
importance and replay memory, shared by all; the layer is `ttt.nn.FleetLinear`.
"""
