"""Which channels does one image open? python examples/saliences.py"""

import torch
from cifar_resnet import resnet8
from own_training import digits, train

import gatefit
from gatefit.gating.gates import gates_of


def main() -> None:
    torch.manual_seed(0)
    network = resnet8()
    train(network, epochs=3, lr=0.05)
    gated = gatefit.retrofit(network, torch.zeros(2, 3, 8, 8))
    train(gated, epochs=3, lr=0.02, l1=0.02)

    images, labels = digits(test=True)
    gated(images[:1])  # each gate keeps what it computed in the last forward
    for name, gate in gates_of(gated).items():
        block = gate.salience(gate.outputs.block)[0, 0]
        channels = gate.salience(gate.outputs.channel)[0]
        opened = int((channels > 0).sum())
        print(f"a {labels[0]}: {name} runs at {block:.2f}, {opened} of {len(channels)} channels open")


if __name__ == "__main__":
    main()
