"""Cut a checkpoint for tensor parallelism, rebuild it, recut it, and prove the shards right."""

__version__ = "0.1.0"
