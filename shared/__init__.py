"""What the services share: messages, keys, streams, the tensor pool, settings, errors."""
