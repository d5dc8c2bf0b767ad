# Step 2: exact histograms of what enters every matrix, over the calibration text.
rule calibrate:
    input:
        model=rules.convert.output[0],
        text=lambda wildcards: STUDY.calibration_text(wildcards.model),
    output:
        f"{RESULTS}/{{model}}/histograms.safetensors",
    log:
        f"{RESULTS}/logs/calibrate/{{model}}.log",
    benchmark:
        f"{RESULTS}/logs/calibrate/{{model}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=1,
        mem_mb=lambda wildcards, input: STUDY.model_mb(wildcards.model, input.model),
        runtime=120,
    params:
        options=lambda wildcards: options(STUDY.models[wildcards.model].calibration),
        machine=options(STUDY.machine),
        source=source_hash("calibrate"),
    message:
        "Calibrating {wildcards.model}"
    shell:
        "sparsetrace calibrate {input.model:q} --text {input.text:q} --out {output:q}"
        " {params.options} {params.machine} > {log:q} 2>&1"
