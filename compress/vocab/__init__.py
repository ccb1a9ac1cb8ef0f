"""A tokenizer's vocabulary as data: what its tokens are made of, and folders with fewer of them."""
