"""`gatefit evaluate`."""

from gatefit.commands.cli.session import (
    Data,
    Device,
    Folder,
    Json,
    SkipCorrupt,
    TrustCode,
    choose_device,
    print_json,
    say_input,
    session,
)


def evaluate(
    folder: Folder,
    data: Data = "",
    device: Device = "",
    skip_corrupt: SkipCorrupt = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy and MACs per image of a converted network.

    Also show how often it answers as the original does, and how far its gates open.
    """
    with session(f"evaluate {folder}") as stdout:
        choose_device(device)
        from rich.console import Console

        from gatefit.commands.display import show_report
        from gatefit.commands.opened import evaluate_folder

        say_input(folder)
        _, report = evaluate_folder(folder, data, skip_corrupt, trust_code)
        if as_json:
            print_json(stdout, report)
        else:
            show_report(Console(file=stdout, markup=False), report)
