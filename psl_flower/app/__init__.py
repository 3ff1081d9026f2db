"""The default app, what ``flwr run .`` from the repository root runs, and what its data and scripts are made of."""
