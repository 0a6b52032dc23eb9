"""Convert a network in Python, save it and load it: python examples/convert_in_python.py [FOLDER]"""

import sys

import torch
from cifar_resnet import resnet8
from own_training import train

import gatefit
from gatefit.recipe import FinetunePart


def main(folder: str) -> None:
    torch.manual_seed(0)
    network = resnet8()
    network.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (1.0,) * 3}
    train(network, epochs=3, lr=0.05)

    found = gatefit.find_blocks(network)
    print(f"{len(found.blocks)} blocks, {found.macs / 1e6:.2f} M MACs: {', '.join(b.name for b in found.blocks)}")

    gated = gatefit.retrofit(network, gates="c", form="step", compensation=True)
    settings = FinetunePart(epochs=4, batch_size=64, flip=False, augment=False)
    gatefit.finetune(gated, "digits", teacher=network, target=0.6, settings=settings)
    figures = gatefit.evaluate(gated, "digits", teacher=network)
    print(f"accuracy {figures.dense_accuracy:.3f} -> {figures.accuracy:.3f} at {figures.share:.3f} of the MACs")
    print(f"{figures.paths} different paths for {figures.images} images")

    gatefit.save(gated, folder)
    again = gatefit.load(folder, model=resnet8())
    x = torch.randn(4, 3, 8, 8)
    print("the same to the bit when loaded again:", torch.equal(gated(x), again(x)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
