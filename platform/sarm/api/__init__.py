"""SARM in a few lines of Python, by the code that the jobs run: `sarm.train`, `sarm.load`, and what they give back."""
