"""FAVE: one-step generative sequential recommendation.

A user's last items go in, one forward pass of a flow-matching transformer gives the embedding of the next item, and an
exact inner-product top-K over the whole catalogue comes out.
"""

__version__ = "0.1.0"
