"""`make demo`: the whole way from a few pictures to pictures of them, by the faces a user has.

A zip of pictures goes through `train.train`, its weights.zip through `predict.Predictor`; nothing
here reaches behind them. The base is the embedded miniature, so it takes minutes without a GPU.
"""
