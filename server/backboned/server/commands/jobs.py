"""`backboned jobs`: what is being trained, and what was."""

from typing import Annotated

import typer

from backboned.client import FINAL_STATES, Client
from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import as_dict, console, duration, fail, label, print_json, print_table, when
from backboned.server.commands.training_view import JsonView, TrainingView
from backboned.v1 import model_service_pb2 as pb

app = typer.Typer(
    rich_markup_mode=None, add_completion=False, invoke_without_command=True, help="List jobs, or follow and end one."
)

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


@app.callback()
def jobs(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this model.")] = "",
    filter: Annotated[str, typer.Option("--filter", help="As in: state = FAILED AND model:flowers")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """List jobs, newest first; or follow one, show it or end it."""
    if context.invoked_subcommand is not None:
        return
    with Client(server) as client:
        found = [job for _, job in zip(range(limit), client.list_jobs(model=model, filter=filter), strict=False)]
    if json:
        for job in found:
            print_json(job)
    else:
        columns = ["job", "model", ">version", "state", ">accuracy", "created", ">took"]
        print_table(columns, map(_row, found), empty="no job")
        for job in found:
            if job.error:
                console().print(f"{job.id}: {job.error}", style="red")


@app.command()
def show(job_id: JobId, server: Server = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Show a job and what was asked for."""
    with Client(server) as client:
        job = client.get_job(job_id)
    if json:
        print_json(job)
        return
    told = as_dict(job) | {"state": label(pb.JobState.Name(job.state), "JOB_STATE_")}
    told |= {f"{name}_time": when(getattr(job, f"{name}_time")) for name in ("create", "start", "end")}
    options = as_dict(job.request.options)
    rows = [[name, str(value)] for name, value in told.items() if name not in ("request", "best") and value]
    rows += [[name, getattr(job.request, name)] for name in ("backbone", "dataset", "request_id")]
    rows += [[f"options.{name}", str(value)] for name, value in options.items() if value not in ([], "")]
    if job.HasField("best"):
        rows.append(["best", f"epoch {job.best.epoch}: {job.best.uri}"])
    print_table(["field", "value"], rows, empty="nothing")


@app.command()
def watch(job_id: JobId, server: Server = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Follow a job until it ends; Ctrl-C leaves it running."""
    with Client(server) as client:
        follow(client, client.get_job(job_id), json=json)
        job = client.get_job(job_id)
    if json:
        print_json({"job": as_dict(job)})
    require_success(job)


@app.command()
def cancel(job_id: JobId, server: Server = DEFAULT_ADDRESS, json: Json = False) -> None:
    """End a job; checkpoints that it has finished are kept."""
    with Client(server) as client:
        job = client.cancel_job(job_id)
    if json:
        print_json(job)
    else:
        ended = job.state in FINAL_STATES
        state = label(pb.JobState.Name(job.state), "JOB_STATE_")
        console().print(f"job {job.id}: {state}" if ended else f"job {job.id} is being cancelled")


def follow(client: Client, job: pb.Job, *, json: bool) -> None:
    """Show a job's events until it ends."""
    with JsonView() if json else TrainingView(job) as view:
        for event in client.watch(job.id):
            view.show(event)


def require_success(job: pb.Job) -> None:
    """End the command with what went wrong, unless the job has ended well."""
    if job.state != pb.JOB_STATE_SUCCEEDED:
        state = label(pb.JobState.Name(job.state), "JOB_STATE_")
        fail(f"job {job.id} {state}" + (f": {job.error}" if job.error else ""))
        raise typer.Exit(1)


def took_seconds(job: pb.Job) -> float:
    """From a job's start to its end, or 0 where one of them isn't known."""
    if not (job.HasField("start_time") and job.HasField("end_time")):
        return 0.0
    return (job.end_time.ToNanoseconds() - job.start_time.ToNanoseconds()) / 1e9


def _row(job: pb.Job) -> list[str]:
    return [
        job.id,
        job.model,
        str(job.version or ""),
        label(pb.JobState.Name(job.state), "JOB_STATE_"),
        f"{job.best.val_accuracy:.4f}" if job.best.HasField("val_accuracy") else "",
        when(job.create_time),
        duration(took_seconds(job)) if took_seconds(job) else "",
    ]
