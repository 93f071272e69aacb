"""Choose the integers of the weights: GPTQ, AdaRound, tuning, the walk over blocks, and resuming a stopped run."""
