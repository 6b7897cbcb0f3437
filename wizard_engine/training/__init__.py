"""The loops of training: options, runs, their state, metrics of routers, audit, reference log-probabilities."""
