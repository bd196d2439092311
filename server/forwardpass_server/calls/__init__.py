"""One call of a model: plans, batching, scheduling, admission, execution."""
