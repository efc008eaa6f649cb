"""The HTTP server of `python -m fave_fast.serve`: an ASGI app over `Recommender` and `MicroBatcher`.

Needs the packages of `pip install 'fave-fast[serve]'`.
"""
