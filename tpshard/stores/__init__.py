"""Object stores as the place of a checkpoint: ``s3://``, ``gs://``, ``az://``, and ``hf://`` for reading."""
