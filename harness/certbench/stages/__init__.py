"""The stages of a run: what each asks of the engines, and the rows it makes of the answer."""
