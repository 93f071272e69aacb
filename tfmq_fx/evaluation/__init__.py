"""Measure how far from float a network is: errors by timestep, trajectories, features of pictures, plots."""
