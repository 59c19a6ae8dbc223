"""A patched model as the file of a runtime: a sampler that the runtime has, coordinates that stay exact, a check in the runtime.

`targets` says what each runtime takes, `exportable` gives a model the sampler, `graph` makes and changes the ONNX graph,
`runtimes` writes and runs the files of other formats, `checking` compares, and `export` goes from the model to the file.
"""
