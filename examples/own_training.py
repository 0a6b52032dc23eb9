"""Your own training loop needs one call for the gates: python examples/own_training.py

The same loop trains the dense network and then the gated one; only the penalty knows of gates.
"""

import torch
import torch.nn.functional as F
from cifar_resnet import resnet8
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gatefit


def digits(test: bool) -> tuple[Tensor, Tensor]:
    """Images and labels, to train on or to test on: divided as gatefit divides its "digits"."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)[test]
    images = torch.tensor(pixels[chosen], dtype=torch.float).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16 - 0.5
    return images, torch.tensor(labels[chosen])


def train(network: nn.Module, epochs: int, lr: float, l1: float = 0.0) -> None:
    images, labels = digits(test=False)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            if l1:
                loss = loss + l1 * gatefit.salience_penalty(network)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()


def main() -> None:
    torch.manual_seed(0)
    network = resnet8()
    train(network, epochs=3, lr=0.05)
    gated = gatefit.retrofit(network, torch.zeros(2, 3, 8, 8))  # the paper's form: both gates, ReLU-1
    train(gated, epochs=3, lr=0.02, l1=0.02)
    figures = gatefit.evaluate(gated, digits(test=True), network)
    print(f"accuracy {figures.dense_accuracy:.3f} -> {figures.accuracy:.3f} at {figures.share:.3f} of the MACs")


if __name__ == "__main__":
    main()
