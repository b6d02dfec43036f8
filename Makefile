# make install   a virtual environment in .venv with the pinned dependencies
# make demo      train, kill, recover bit-exactly, fine-tune, export, generate (about 5 minutes on 2 cores)
# make unit      the fast tests
# make test      lint, import rules, types and every test, real kills included

VENV := .venv
PYTHON := $(VENV)/bin/python
SPREAD := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2
PURE := moe/refs.py moe/layout.py moe/quantised.py moe/family_table.py moe/dispatch_choice.py moe/tracefile.py trainer/doctor_report.py checkpointing/units.py \
        checkpointing/records.py checkpointing/xxh3.py checkpointing/recovery.py \
        checkpointing/storage.py checkpointing/remote.py checkpointing/compare.py checkpointing/audit.py \
        checkpointing/schedule.py checkpointing/moments.py checkpointing/cost.py checkpointing/bandwidth.py checkpointing/partial.py \
        checkpointing/plt.py lora/config.py lora/methods.py lora/trained_methods.py lora/combinations.py lora/presets.py lora/tenant_rules.py lora/targets.py lora/owners.py lora/cost.py inference/policies.py inference/shadow.py inference/activation.py inference/reuse.py inference/predictors.py inference/simulate.py inference/errors.py inference/requests.py inference/blocks.py inference/scheduler.py inference/text.py inference/limits.py inference/shards.py inference/stats.py trainer/simulate_cli.py trainer/generate_cli.py trainer/cli.py trainer/output.py trainer/recipe.py trainer/recipe_messages.py trainer/model_shapes.py trainer/activations.py trainer/adapter_plan.py trainer/esft_file.py trainer/adapter_seal.py trainer/plan.py trainer/plan_card.py \
        inference/foresight.py inference/recorded_heads.py inference/timeline.py inference/analytic.py inference/chart.py \
        trainer/lookahead_cli.py \
        inference/cores.py inference/costmodel.py inference/planner.py inference/phases.py inference/packed_block.py inference/placement.py inference/forecast.py inference/report.py \
        trainer/plan_inference_cli.py \
        trainer/schema.py trainer/faults.py trainer/recipe_view.py trainer/recipe_checks.py \
        trainer/data_rules.py trainer/optimizer_rules.py trainer/chat_layouts.py trainer/chat_packing.py checkpointing/heldout.py \
        trainer/checkpoint_checks.py trainer/mode_plan.py trainer/disk_rules.py trainer/routing_rules.py trainer/loss_verdict.py trainer/checkpoints.py \
        trainer/checkpoint_cli.py trainer/adapter_cli.py lora/exactness.py lora/base_facts.py checkpointing/phases.py trainer/phases.py trainer/endings.py trainer/supervisor.py \
        trainer/timesplit.py checkpointing/keeper/faults.py trainer/leftovers.py trainer/matrix.py \
        trainer/matrix_verdict.py trainer/bank_rules.py trainer/dense_rules.py trainer/tenant_recipe.py trainer/admission.py trainer/family_checks.py trainer/family_shapes.py benchmarks/report.py benchmarks/layer_report.py benchmarks/lora_quality_report.py benchmarks/inference_report.py \
        inference/prompts.py inference/chat.py inference/server/errors.py inference/server/metrics.py inference/server/fields.py inference/server/engine_thread.py \
        inference/server/bodies.py inference/server/service.py inference/server/app.py inference/server/gate.py inference/server/serve.py inference/runtime.py trainer/runtime_cli.py trainer/serve_cli.py

.PHONY: install demo unit test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,serve]"
	touch $@

demo: install
	$(PYTHON) -m trainer.demo

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy $(PURE)
	$(PYTHON) tests/size_limits.py

unit: install
	$(SPREAD) -m "not slow and not drill and not gpu"

# Drills one after the other: each has the machine to itself, as its deadlines suppose.
test: lint
	$(SPREAD) -m "not drill and not gpu"
	$(PYTHON) -m pytest -m "drill and not gpu"

clean:
	rm -rf $(VENV) runs build *.egg-info
