"""Put a converted model on the Hugging Face hub, as a folder that upswap and the model's own library open.

    hf auth login
    python examples/push_to_hub.py unet.upswap.pt USER/NAME [--private]

The folder NAME is written here first, with a model card to be completed, and can be pushed again after changes.
"""

import argparse
from pathlib import Path

import huggingface_hub

import upswap

CARD = """\
---
tags:
- upswap
- dysample
---
# {name}

A {model} with {count} learned upsamplers (DySample) in the place of fixed interpolation, made with
[upswap](https://pypi.org/project/upswap): {sites}.

```python
import huggingface_hub
import upswap

{load}
```

`model.safetensors` has the weights of the model without the upsamplers, `upswap.safetensors` those of the upsamplers.
"""
LOAD = """\
folder = huggingface_hub.snapshot_download("{repo}")
model = upswap.load(folder)"""


def main(path: str, repo: str, private: bool = False) -> None:
    """Push the model in `path`, a file or folder that upswap wrote, to the repository `repo`."""
    name = repo.rpartition("/")[2]
    model, folder, load = upswap.load(path), Path(name), LOAD.format(repo=repo)
    folder.mkdir(exist_ok=True)
    upswap.save(model, folder, force=True)
    upswap.load(folder)  # what others will do: better to fail here than there

    card = folder / "README.md"
    if not card.exists():
        sites = upswap.upsamplers(model)
        card.write_text(
            CARD.format(name=name, model=type(model).__name__, count=len(sites), sites=", ".join(sites), load=load)
        )

    huggingface_hub.create_repo(repo, private=private, exist_ok=True)
    huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model with learned upsampling")
    print(f"{folder}/ is on the hub. To load it from there:\n\n{load}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the file or folder that upswap wrote")
    parser.add_argument("repo", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="let only you see it")
    main(**vars(parser.parse_args()))
