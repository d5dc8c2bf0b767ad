# Step 2: exact histograms of what enters every matrix, over the calibration text.
rule calibrate:
    input:
        model=lambda wildcards: STUDY.runtime_model(wildcards.model),
        text=lambda wildcards: STUDY.calibration_text(wildcards.model),
    output:
        f"{RESULTS}/{{model}}/histograms/{{shard}}.safetensors",
    log:
        f"{RESULTS}/logs/calibrate/{{model}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/logs/calibrate/{{model}}/{{shard}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=STUDY.gpus,
        mem_mb=lambda wildcards, input, attempt: STUDY.needs(
            "calibrate", wildcards.model, input.model, attempt
        ).mem_mb,
        runtime=lambda wildcards, input, attempt: STUDY.needs(
            "calibrate", wildcards.model, input.model, attempt
        ).runtime,
    params:
        shard=lambda wildcards: int(wildcards.shard),
        scores=lambda wildcards: repeated("--score", STUDY.scores(wildcards.model)),
        options=lambda wildcards: options(STUDY.models[wildcards.model].calibration),
        machine=options(STUDY.machine),
        source=source_hash("calibration.calibrate"),
    message:
        "Calibrating {wildcards.model}, shard {wildcards.shard}"
    shell:
        "sparsetrace calibrate {input.model:q} --text {input.text:q} --shard {params.shard} {params.scores}"
        " --out {output:q} {params.options} {params.machine} > {log:q} 2>&1"


# Adds up the shards.
rule histograms:
    input:
        lambda wildcards: expand(
            rules.calibrate.output[0],
            shard=STUDY.calibration_shards(wildcards.model),
            model=wildcards.model,
        ),
    output:
        f"{RESULTS}/{{model}}/histograms.safetensors",
    log:
        f"{RESULTS}/logs/histograms/{{model}}.log",
    benchmark:
        f"{RESULTS}/logs/histograms/{{model}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: attempt * 2000,
        runtime=lambda wildcards, attempt: attempt * 10,
    params:
        source=source_hash("calibration.merge"),
    message:
        "Adding up the histograms of {wildcards.model}"
    shell:
        "sparsetrace calibrate --merge {input:q} --out {output:q} > {log:q} 2>&1"
