// Lets the search work where the site is opened from disk. Browsers start no Worker from a file, so
// there its script runs in a hidden frame, which passes messages as a Worker does. The theme loads a
// script of this name; the one that it would fetch itself is on a server.
"use strict"

class FrameWorker extends EventTarget {
  constructor(script) {
    super()
    this.frame = document.createElement("iframe")
    this.frame.hidden = true
    this.loaded = new Promise(resolve => { this.started = resolve })
    document.body.appendChild(this.frame)
    const inside = this.frame.contentWindow
    inside.answer = data => this.receive(data)
    inside.started = this.started
    inside.document.open()
    inside.document.write(
      "<script>postMessage = data => answer(data)<\/script>" +
      `<script src="${script}" onload="started()"><\/script>`
    )
    inside.document.close()
  }

  receive(data) {
    const message = new MessageEvent("message", { data: structuredClone(data) })
    this.dispatchEvent(message)
    if (this.onmessage) this.onmessage(message)
  }

  postMessage(data) {
    this.loaded.then(() => {
      const inside = this.frame.contentWindow
      inside.dispatchEvent(new inside.MessageEvent("message", { data: structuredClone(data) }))
    })
  }

  terminate() {
    this.frame.remove()
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker
