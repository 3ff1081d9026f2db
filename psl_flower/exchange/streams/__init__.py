"""The stream carrier: one gRPC stream a client process, opened from one Flower message a client and run."""
