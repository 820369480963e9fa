// The file goes to Python in the event itself, so that it is on no disk on the way.
element.querySelector("input").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (!file) return;
  const send = (data, error) => {
    props.value = { name: file.name, data, error };
    trigger("upload");
  };
  if (file.size > LARGEST) {
    send("", `${file.name}: a photograph may have LARGEST bytes, this has ${file.size}`);
  } else {
    const reader = new FileReader();
    reader.onload = () => send(reader.result, "");
    reader.onerror = () => send("", `${file.name}: the browser cannot read it`);
    reader.readAsDataURL(file);
  }
  event.target.value = "";
});
