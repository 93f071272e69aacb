"""Find the temporal block and make it a submodule. Results stay bitwise equal."""
