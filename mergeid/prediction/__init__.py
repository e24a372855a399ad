"""How high is the barrier between two models? Said before merging, without running a network between them."""
