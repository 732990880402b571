"""What an engine keeps beside its tensors: its own configuration, and the files and values that its loader wants.

Most of a profile is data; this is the part that is arithmetic.
"""
