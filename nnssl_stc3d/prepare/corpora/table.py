"""The table of public corpora; documentation/corpora.md says the same in words."""

from __future__ import annotations

from nnssl_stc3d.prepare.corpora.abdomen import list_amos, list_btcv, list_flare22, list_kits, list_lits
from nnssl_stc3d.prepare.corpora.chest import list_cc_ccii, list_luna16, list_tcia_covid19
from nnssl_stc3d.prepare.corpora.corpus import Corpus, organs, same_values
from nnssl_stc3d.prepare.corpora.heart_and_brain import list_brats21, list_mmwhs

# The reader that nnU-Net's own converters choose for these corpora, whose axes are ordered in several ways.
_REORIENT = {"overwrite_image_reader_writer": "NibabelIOWithReorient"}
_TEST = "test images without labels: imagesTs"

_BTCV = organs(
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
_FLARE22 = organs(
    "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
    "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney",
)  # fmt: skip
_AMOS = organs(
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate or uterus",
)  # fmt: skip
_LITS = organs("liver", "tumor")
_MMWHS = organs(
    "left ventricle myocardium", "left atrium", "left ventricle", "right atrium", "right ventricle",
    "ascending aorta", "pulmonary artery",
)  # fmt: skip

CORPORA = {
    "btcv": Corpus(
        title="BTCV (Multi-Atlas Labeling Beyond the Cranial Vault, abdomen)",
        page="https://www.synapse.org/#!Synapse:syn3193805",
        licence="terms of the challenge, accepted on Synapse",
        layout=(
            "RawData/Training/img/img0001.nii.gz",
            "RawData/Training/label/label0001.nii.gz",
            "RawData/Testing/img/img0061.nii.gz",
            "or averaged-training-images/DET0000101_avg.nii.gz",
            "   averaged-training-labels/DET0000101_avg_seg.nii.gz",
        ),
        list_cases=list_btcv,
        labels=_BTCV,
        label_values=same_values(_BTCV),
        split=_TEST,
    ),
    "flare22": Corpus(
        title="FLARE 22",
        page="https://flare22.grand-challenge.org",
        licence="rules of the challenge; no licence could be confirmed",
        layout=(
            "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz",
            "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0001.nii.gz",
            "Training/FLARE22_UnlabeledCase1-1000/Case_00001_0000.nii.gz",
            "Tuning/images/FLARETs_0001_0000.nii.gz",
            "Tuning/labels/FLARETs_0001.nii.gz",
        ),
        list_cases=list_flare22,
        labels=_FLARE22,
        label_values=same_values(_FLARE22),
        split="validation: fold 0 where it has labels, else imagesTs",
    ),
    "amos": Corpus(
        title="AMOS 22",
        page="https://zenodo.org/record/7262581",
        licence="a Creative Commons licence, non-commercial as stated with the paper; read it where you download",
        layout=(
            "imagesTr/amos_0001.nii.gz",
            "labelsTr/amos_0001.nii.gz",
            "imagesVa/amos_0008.nii.gz",
            "labelsVa/amos_0008.nii.gz",
            "imagesTs/amos_0002.nii.gz",
        ),
        list_cases=list_amos,
        modalities=("CT", "MR"),
        labels=_AMOS,
        label_values=same_values(_AMOS),
        split="training and validation: fold 0; test images without labels: imagesTs",
        extra=_REORIENT,
    ),
    "lits": Corpus(
        title="LiTS",
        page="https://competitions.codalab.org/competitions/17094",
        licence="terms of the challenge; no licence could be confirmed",
        layout=(
            "Training Batch 1/volume-0.nii",
            "Training Batch 1/segmentation-0.nii",
            "Training Batch 2/volume-28.nii",
            "test-volume-0.nii",
        ),
        list_cases=list_lits,
        labels=_LITS,
        label_values=same_values(_LITS),
        split=_TEST,
    ),
    "kits": Corpus(
        title="KiTS (19, 21 or 23)",
        page="https://kits-challenge.org, https://github.com/neheller/kits23",
        licence="CC BY-NC-SA",
        layout=(
            "case_00000/imaging.nii.gz",
            "case_00000/segmentation.nii.gz (KiTS19 and 23) or case_00000/aggregated_MAJ_seg.nii.gz (KiTS21)",
        ),
        list_cases=list_kits,
        # Regions as in nnU-Net's converter of KiTS23.
        labels={"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2},
        label_values={value: value for value in range(4)},
        split=f"{_TEST} (KiTS19)",
        extra={"regions_class_order": [1, 3, 2], **_REORIENT},
    ),
    "mmwhs": Corpus(
        title="MM-WHS",
        page="https://zmiclab.github.io/zxh/0/mmwhs",
        licence="terms of the challenge; no licence could be confirmed",
        layout=(
            "ct_train/ct_train_1001_image.nii.gz",
            "ct_train/ct_train_1001_label.nii.gz",
            "ct_test/ct_test_2001_image.nii.gz",
            "mr_train/mr_train_1001_image.nii.gz, ...",
        ),
        list_cases=list_mmwhs,
        modalities=("CT", "MR"),
        labels=_MMWHS,
        # One of the MR segmentations has 421 where 420 is meant.
        label_values={0: 0, 205: 1, 420: 2, 421: 2, 500: 3, 550: 4, 600: 5, 820: 6, 850: 7},
        split=_TEST,
    ),
    "brats21": Corpus(
        title="BraTS 21",
        page="https://www.synapse.org/#!Synapse:syn25829067",
        licence="terms of the challenge, accepted on Synapse",
        layout=(
            "BraTS2021_00000/BraTS2021_00000_t1.nii.gz",
            "BraTS2021_00000/BraTS2021_00000_t1ce.nii.gz",
            "BraTS2021_00000/BraTS2021_00000_t2.nii.gz",
            "BraTS2021_00000/BraTS2021_00000_flair.nii.gz",
            "BraTS2021_00000/BraTS2021_00000_seg.nii.gz",
        ),
        list_cases=list_brats21,
        modalities=("MR",),
        # Channels, values and regions of nnU-Net's converter, whose folder is written into it.
        channels=("T1", "T1ce", "T2", "Flair"),
        labels={"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
        label_values={0: 0, 1: 2, 2: 1, 4: 3},
        split="validation images without labels: imagesTs",
        extra={"regions_class_order": [1, 2, 3]},
    ),
    "luna16": Corpus(
        title="LUNA16",
        page="https://luna16.grand-challenge.org/Data",
        licence="CC BY 4.0 (of LIDC-IDRI: CC BY 3.0)",
        layout=("subset0/1.3.6.1.4.1.14519.5.2.1.[...].mhd, with the .raw beside it", "... to subset9"),
        list_cases=list_luna16,
        split="ten folds, subset 0 to 9",
    ),
    "tcia-covid19": Corpus(
        title="CT Images in COVID-19 (TCIA)",
        page="https://doi.org/10.7937/TCIA.2020.GQRY-NC81",
        licence="CC BY 4.0",
        layout=(
            "CT-Images-in-COVID-19/PATIENT/STUDY/SERIES/1-001.dcm, as the NBIA Data Retriever writes it",
            "or volume-covid19-A-0000.nii.gz",
        ),
        list_cases=list_tcia_covid19,
    ),
    "cc-ccii": Corpus(
        title="CC-CCII",
        page="http://ncov-ai.big.ac.cn/download",
        licence="CC BY 3.0 CN, as stated by others who use it",
        layout=("NCP/PATIENT/SCAN/0000.png (or .jpg)", "CP/PATIENT/SCAN/...", "Normal/PATIENT/SCAN/..."),
        list_cases=list_cc_ccii,
        # Windowed to 8 bits: not Hounsfield units.
        modalities=("",),
        channels=("windowed CT",),
    ),
}
"""Corpora by the name that the command has for them."""
MSD = "msd"
"""Name of the Medical Segmentation Decathlon, which nnU-Net converts itself."""
