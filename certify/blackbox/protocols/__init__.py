"""Registry of the wire formats of services.

``FORMATS.get(NAME)(**options)`` returns a :class:`~certify.blackbox.types.Format`. Listing the names imports no format.
"""

from __future__ import annotations

from collections.abc import Mapping

from certify.registry import Registry

FORMATS = Registry("protocol", "certify.protocols")
_HERE = "certify.blackbox.protocols"
FORMATS.add("v2", f"{_HERE}.v2:v2", "Open Inference Protocol v2: KServe, MLServer, Triton, certify serve")
FORMATS.add("tf-serving", f"{_HERE}.tf_serving:tf_serving", "TensorFlow Serving's predict, KServe v1")
FORMATS.add("json", f"{_HERE}.post_image:post_image", "an image by POST, labels and scores found by JMESPath")
FORMATS.add("hugging-face", f"{_HERE}.cloud_vision:hugging_face", "Hugging Face image classification")
FORMATS.add("rekognition", f"{_HERE}.cloud_vision:rekognition", "AWS Rekognition DetectLabels; through boto3")
FORMATS.add("google-vision", f"{_HERE}.cloud_vision:google_vision", "Google Cloud Vision label detection")
FORMATS.add("azure-vision", f"{_HERE}.cloud_vision:azure_vision", "Azure AI Vision Image Analysis 4.0, tags")
FORMATS.add("clarifai", f"{_HERE}.cloud_vision:clarifai", "Clarifai models, concepts")

ENDPOINTS: Mapping[str, str] = {
    "hugging-face": "https://router.huggingface.co/hf-inference",
    "google-vision": "https://vision.googleapis.com",
    "clarifai": "https://api.clarifai.com",
}
"""URLs of services with a single address; Azure's contains the name of the resource, AWS's the region."""

KEY_HEADERS: Mapping[str, str] = {
    "hugging-face": "Authorization: Bearer {key}",
    "google-vision": "X-Goog-Api-Key: {key}",
    "azure-vision": "Ocp-Apim-Subscription-Key: {key}",
    "clarifai": "Authorization: Key {key}",
}
"""Headers for the API key, in the syntax of :func:`~certify.blackbox.client.credentials.read_credential`. AWS requires
a signature instead."""
