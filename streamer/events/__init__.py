"""What is published: the kinds of events, the stream's own records, and batches of them."""
