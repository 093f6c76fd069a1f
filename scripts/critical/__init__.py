"""Measures the critical batch size: problems, single runs, which runs to make, what they say."""
