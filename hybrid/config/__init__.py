"""Configuration of a hybrid language model: config, options, registries and validation."""
