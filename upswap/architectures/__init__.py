"""From a line of text to a new model without weights: `smp:`, `timm:`, `torchvision:`, `python:`.

Specs, the libraries behind them, what is installed and what is trusted. Nothing here opens a file. A new library is one
function in `libraries.py`.
"""
