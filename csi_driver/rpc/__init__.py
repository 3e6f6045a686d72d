"""The CSI protocol: messages in, messages out, and nothing else."""
