"""What any such program needs and a reader need not read: flags, files, runs, processes, data, pictures, measures.

It knows nothing of the models."""
