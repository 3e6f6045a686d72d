"""Kubernetes' own external-storage suite against the driver: what a cluster's admin trusts more than any test of ours.

One file per backend tells the suite what the driver claims; the suite skips what is not claimed, so each skip has to be explained.
"""
