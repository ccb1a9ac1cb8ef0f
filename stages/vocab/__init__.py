"""`reduce-vocab`: a smaller vocabulary, in the tokenizer and in the model."""
