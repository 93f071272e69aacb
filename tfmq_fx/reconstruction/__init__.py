"""Which integers: GPTQ, AdaRound, tuning, the walk over blocks, and what a stopped run has finished."""
