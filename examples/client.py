"""Fine-tune a classifier on a folder of photos, then ask it: `python examples/client.py FOLDER BACKBONE [ADDRESS]`.

FOLDER has a folder of images for each class, and lies below a data root of the daemon.
"""

import sys
from pathlib import Path

from backboned.client import DEFAULT_ADDRESS, Client, ClientError
from backboned.v1 import model_service_pb2 as pb


def fine_tune(client: Client, folder: Path, backbone: str) -> pb.Job:
    """Train a model named after the folder, and tell of each epoch."""
    job = client.fine_tune(folder.name, backbone, folder, max_epochs=10)
    for event in client.watch(job.id):
        if event.HasField("epoch"):
            print(f"epoch {event.epoch.epoch}: validation accuracy {event.epoch.val_accuracy:.3f}")
    return client.get_job(job.id)


def ask(client: Client, model: str, folder: Path) -> None:
    """Classify all photos over one stream, and count the right answers."""
    photos = sorted(folder.glob("*/*.jpg")) or sorted(folder.glob("*/*.png"))
    labels = [photo.parent.name for photo in photos]
    replies = client.predict_stream(model, photos, top_k=1, labels=labels)
    answers = [prediction.classes[0].label for reply in replies for prediction in reply.predictions]
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    print(f"{right} of {len(photos)} photos right, those that trained it among them")


def main(folder: str, backbone: str, address: str = DEFAULT_ADDRESS) -> None:
    """Do both; end with the daemon's own words if something goes wrong."""
    path = Path(folder).resolve()
    try:
        with Client(address) as client:
            job = fine_tune(client, path, backbone)
            if job.state != pb.JOB_STATE_SUCCEEDED:
                sys.exit(job.error)
            ask(client, job.model, path)
    except ClientError as error:
        sys.exit(f"{error.code.name}: {error.message}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
