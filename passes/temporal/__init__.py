"""Find the temporal block and give it a place of its own. Results stay bitwise equal."""
