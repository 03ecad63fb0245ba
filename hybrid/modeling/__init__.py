"""Model: layers, residuals, embeddings, losses, multi-token prediction, context parallelism."""
