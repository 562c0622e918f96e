"""Benchmarks: fastconv beside its peers, on the layers of published networks. README.md here has the protocol.

Installed as `fastconv.bench`, so that `fastconv bench` runs anywhere; results and plots live in the repository.
"""
