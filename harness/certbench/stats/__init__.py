"""Statistics of counts and comparisons: numpy and scipy, never torch, and nothing else of certbench."""
