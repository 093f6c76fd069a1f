"""A handwritten-digits CNN and a small character GPT, trained with the monitor attached."""
