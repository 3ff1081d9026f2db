"""Three hospitals and a registry: inputs and labels stay in the hospitals."""
