"""Many models in one go: a catalogue of sources, a journal of what was done, a report.

sources --catalog--> jobs --engine--> a child process for each --job--> rows in a journal --report--> table, CSV, HTML
"""
