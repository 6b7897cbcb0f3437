"""One file per operation: reference, kernels, autograd, public function. Part of wizard-engine."""

PROJECT = "wizard-engine"
