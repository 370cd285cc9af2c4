"""The monitor's rules inside a training run, and being told."""

import http.server
import json
import threading
import time

import pytest

from svdtrain.hooks.alerts import Notifier
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.state import Alert
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus

CRITICAL = Alert(level="CRITICAL", rule="switch_now", message="a 'quoted' matrix")


class Disturb(Hook):
    """Publishes a loss that jumps, and an analysis beyond the limit."""

    name = "disturb"

    def on_step_end(self, state) -> None:
        state.log("svd", {"svd/h.9.x/principal_alignment": 0.9 if state.step >= 20 else 0.1, "svd/h.9.x/mode": 0.0})


def test_rules_alert_in_training_and_write_it_down(tmp_path) -> None:
    corpus = write_corpus(tmp_path)
    settings = tiny_settings(corpus, train={"num_iterations": 24}, svd={"svd_preset": "off", "svd_rule": "original"})
    tiny_trainer(tmp_path / "run", settings, extra_hooks=[Disturb()]).fit()
    alerts = [(a["level"], a["rule"], a["step"]) for a in records(tmp_path / "run", "alert")]
    assert ("CRITICAL", "over_limit", 21) in alerts  # Disturb speaks after the rules have looked at step 20
    assert [rule for _, rule, _ in alerts].count("over_limit") == 1


def test_a_command_gets_the_alert(tmp_path) -> None:
    out = tmp_path / "told.json"
    notifier = Notifier(command=f"sh -c 'cat > {out}; echo \"$SVD_ALERT_RULE $SVD_ALERT_STEP\" >> {out}'")
    notifier.tell(Alert(level="WARNING", rule="x", message="below the level"), step=1, run="r")
    notifier.tell(CRITICAL, step=7, run="runs/a")
    notifier.close()
    told, environment = out.read_text().split("}", 1)
    assert json.loads(told + "}")["message"] == CRITICAL.message
    assert environment.strip() == "switch_now 7"


def test_a_webhook_gets_the_alert() -> None:
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        notifier = Notifier(webhook=f"http://127.0.0.1:{server.server_port}/hook", level="WARNING")
        notifier.tell(CRITICAL, step=3, run="runs/a")
        notifier.close()
        thread.join()
    assert received[0]["text"].startswith("CRITICAL switch_now at step 3 of runs/a")


def test_a_notifier_that_fails_or_hangs_holds_nothing_up(monkeypatch) -> None:
    monkeypatch.setattr("svdtrain.hooks.alerts.TIMEOUT_S", 0.3)
    notifier = Notifier(command="sleep 30")
    began = time.monotonic()
    notifier.tell(CRITICAL, step=1, run="r")
    assert time.monotonic() - began < 0.2
    time.sleep(0.5)
    with pytest.warns(UserWarning, match="could not be passed on: TimeoutExpired"):
        notifier.close()
    missing = Notifier(command="/no/such/program")
    missing.tell(CRITICAL, step=1, run="r")
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        missing.close()


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ValueError, match="INFO, WARNING, CRITICAL"):
        Notifier(level="loud")
    with pytest.raises(ValueError, match="http"):
        Notifier(webhook="example.org")
