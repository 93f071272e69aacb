"""How far from float: errors by timestep, trajectories, features of pictures, plots."""
