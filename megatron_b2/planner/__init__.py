"""The planner: step time and memory of a layout before it is run, with the error that it has had so far."""
